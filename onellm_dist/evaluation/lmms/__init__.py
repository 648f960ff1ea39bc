"""OneLLM as a model of lmms-eval: for the benchmarks that it has and this package has not.

lmms-eval finds it by the entry point `onellm` of the group `lmms_eval.models`. Only its own process
imports these modules, in an environment where it is installed.
"""
