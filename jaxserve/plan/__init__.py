"""`python -m jaxserve.plan`: compiles a model's steps for devices that are not present."""
