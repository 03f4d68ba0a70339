# Microsoft 365, in Exchange Online PowerShell (Connect-ExchangeOnline): mail of your people to the outside goes to malote
# (config/smart-host.toml), over TLS, and only if the certificate there is that of relay.example.org. Change the names.
New-OutboundConnector -Name "malote" -ConnectorType OnPremises -UseMXRecord $false -SmartHosts "relay.example.org" `
    -TlsSettings DomainValidation -TlsDomain "relay.example.org" -IsTransportRuleScoped $true

# Mail that malote has sealed bears `Malote: 1`: where it comes back through Microsoft 365, it must not go round again.
New-TransportRule -Name "through malote" -FromScope InOrganization -SentToScope NotInOrganization `
    -RouteMessageOutboundConnector "malote" -ExceptIfHeaderContainsMessageHeader "Malote" -ExceptIfHeaderContainsWords "1"
