"""How the demo family is made: small models of the real layout, trained from nothing."""
