"""What a model is made of: families as data, views of modules, hooks where masks multiply."""
