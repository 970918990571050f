"""The training loop for any number of networks with an optimizer each, and all that touches Lightning's internals."""
