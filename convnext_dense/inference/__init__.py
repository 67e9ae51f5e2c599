"""A checkpoint -> predictions on images and videos, as Python objects, files and pictures."""
