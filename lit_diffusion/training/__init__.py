"""The training loop: any number of networks with an optimizer each, and all that touches Lightning's inside."""
