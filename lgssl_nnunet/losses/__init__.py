"""Loss terms as pure functions of tensors; nothing here knows a trainer or a network."""
