"""What tests share: small models, files, references that compute by brute force, tolerances."""
