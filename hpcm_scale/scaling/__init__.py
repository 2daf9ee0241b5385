"""What scale buys: runs read back from their folders, and figures of loss against compute."""
