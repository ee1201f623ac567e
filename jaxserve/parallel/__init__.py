"""Device meshes, and how arrays are sharded over them."""
