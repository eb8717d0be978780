"""How a model on the meta device gets its first weights: from files or initialised, whole or in part."""
