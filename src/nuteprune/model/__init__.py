"""What a model is made of: families as data, live views of modules, the hooks where masks multiply."""
