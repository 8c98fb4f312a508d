"""An invoice with all that its customer needs to check it offline."""
