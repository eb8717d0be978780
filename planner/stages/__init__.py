"""Pipeline stages placed on unequal hosts."""
