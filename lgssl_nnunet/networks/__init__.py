"""Networks built from the plans: the two-decoder and the language-guided U-Net."""
