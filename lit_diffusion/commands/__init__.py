"""Commands besides fit, validate, test and predict: one file each."""
