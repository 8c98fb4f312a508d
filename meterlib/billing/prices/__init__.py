"""Price books: what a token costs, from which day, by whose word; and each customer's terms."""
