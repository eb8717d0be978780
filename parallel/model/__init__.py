"""How a model is called in a pass, and what is kept of its activations."""
