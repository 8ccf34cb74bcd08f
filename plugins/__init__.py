"""What every part of PascalVL agrees on: model shapes, prompts, tensor bindings, the cache's bytes, bundles, errors."""
