# Exchange Server, in the Exchange Management Shell: all mail to the outside goes to malote (config/smart-host.toml), over TLS, and
# only if the certificate there is that of relay.example.org. Change the names; mail1 is your Exchange server.
New-SendConnector -Name "malote" -AddressSpaces "*" -DNSRoutingEnabled $false -SmartHosts "relay.example.org" -Port 25 `
    -RequireTLS $true -TlsAuthLevel DomainValidation -TlsDomain "relay.example.org" -SmartHostAuthMechanism None `
    -SourceTransportServers "mail1"

# What still goes another way is not sealed. Look, then disable those with the address space "*" that are not malote:
Get-SendConnector | Format-List Name, Enabled, AddressSpaces, SmartHosts
# Set-SendConnector "the one before" -Enabled $false
