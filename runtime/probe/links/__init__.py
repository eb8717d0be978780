"""What the links between ranks carry."""
