"""How tensors are split and computed: layouts and sequence-parallel attention."""
