"""How much of an image its smashed data give away: attacks by model inversion, and measures of similarity."""
