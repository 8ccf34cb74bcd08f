"""What every part of PascalVL agrees on: model shapes, tensor bindings, the KV cache's bytes, bundles, user errors."""
