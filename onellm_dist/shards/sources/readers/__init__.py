"""Readers of input formats that several sources share; they import no source."""
