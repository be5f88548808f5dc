"""What turns batches into weights: wires model, data, zero and checkpoint together and knows no detail of them."""
