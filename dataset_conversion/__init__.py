"""Published downloads into raw nnU-Net datasets: one module per dataset, and what they share."""
