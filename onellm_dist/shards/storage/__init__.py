"""Files on local disks and in remote stores."""
