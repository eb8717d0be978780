"""Who holds which range of tensors that are dealt out."""
