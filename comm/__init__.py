"""Process groups and collectives: the only room that calls torch.distributed's communication."""
