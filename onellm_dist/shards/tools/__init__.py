"""Tools for finished datasets: index, verify, repair, show, export."""
