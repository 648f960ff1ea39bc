"""The optimizers of the package, one file each; each defines `OPTIMIZER`."""
