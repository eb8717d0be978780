"""All passes of a rank through one layer, then the next: layers run, cut out of the graph and computed again."""
