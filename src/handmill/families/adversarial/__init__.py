"""The adversarial family: a generator and a discriminator that teach each other."""
