"""Models: what users build, fit and predict with."""
