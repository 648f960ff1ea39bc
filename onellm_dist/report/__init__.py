"""`onellm report`: one page about a run over all its starts."""
