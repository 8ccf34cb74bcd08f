"""The exported graphs node by node, the ops in the plugin's library."""
