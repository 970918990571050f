"""The training loop: any number of networks with an optimiser each, and all that touches Lightning's inside."""
