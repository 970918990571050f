"""Command line of fit, validate, test and predict: LightningCLI, resuming, the order of arguments."""
