"""The start of a run: what is checked, decided and recorded before its first step."""
