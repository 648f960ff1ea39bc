"""The ablations of the paper (Tables 7 and 8) on the toy world."""
