"""Documents, tokenizers and token stores."""
