"""Model families that more than one task uses: timm's transformers cut into segments."""
