"""A sweep in MLflow, TensorBoard and Weights & Biases."""
