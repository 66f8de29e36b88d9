"""tinyllm: a large language model from the derivative up."""
