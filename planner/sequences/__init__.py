"""One step: which ranks work together on which sequences."""
