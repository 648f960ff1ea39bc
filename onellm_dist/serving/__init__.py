"""What a trained model is used through: generation from files and a prompt."""
