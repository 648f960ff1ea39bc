"""Jobs for Kubernetes and SkyPilot: files to read and keep, with one container for each node."""
