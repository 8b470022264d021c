"""Real clients: the training of MocoSFL over a network, see docs/clients.md."""
