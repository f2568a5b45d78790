"""From a model and example inputs to the layouts of all its tensors: the rules, run over its operators."""
