"""`onellm train --show`: what a recipe says and would do, without a start."""
