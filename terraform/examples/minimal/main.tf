# A stream of one shard and one application that reads it by polling: 11 to 12 USD a month.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.2, < 7.0"
    }
  }
}

provider "aws" {
  region = "us-east-1"
}

module "tramline" {
  source = "../.."

  stream_name  = "ctd-ocs-raw-messages"
  applications = { rtr-green = {} }
}

# terraform output -raw rtr-green > rtr-green.toml && tramline consume --config rtr-green.toml
output "rtr-green" {
  value = module.tramline.configuration["rtr-green"]
}

output "producer" {
  value = module.tramline.producer_configuration
}

output "policy_arns" {
  value = module.tramline.policy_arns
}
