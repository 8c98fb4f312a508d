"""What is not accepted: each case is refused by the field's name, with what is allowed, before anything is sent."""
