package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/golang-jwt/jwt/v4"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

const (
	tokenKey   = "nsm-client-token"
	expiresKey = "nsm-client-token-expires"
)

// identity is the newest SVID of the Workload API, as TLS configuration and as maker of tokens.
type identity struct {
	source *workloadapi.X509Source
	life   time.Duration
}

// newIdentity waits for the first SVID.
func newIdentity(ctx context.Context, lifetime time.Duration) (*identity, error) {
	within, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(within)
	if err != nil {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	return &identity{source, lifetime}, nil
}

func (i *identity) id() string {
	svid, err := i.source.GetX509SVID()
	if err != nil {
		return ""
	}
	return svid.ID.String()
}

func (i *identity) server() grpc.ServerOption {
	config := tlsconfig.MTLSServerConfig(i.source, i.source, tlsconfig.AuthorizeAny())
	return grpc.Creds(grpcfd.TransportCredentials(credentials.NewTLS(config)))
}

func (i *identity) dial(url string) (*grpc.ClientConn, error) {
	config := tlsconfig.MTLSClientConfig(i.source, i.source, tlsconfig.AuthorizeAny())
	return grpc.NewClient(url, grpc.WithTransportCredentials(grpcfd.TransportCredentials(credentials.NewTLS(config))))
}

// token signs a token for the peer that holds the certificate.
func (i *identity) token(to *x509.Certificate) (string, time.Time, error) {
	svid, err := i.source.GetX509SVID()
	if err != nil {
		return "", time.Time{}, err
	}
	audience, err := x509svid.IDFromCert(to)
	if err != nil {
		return "", time.Time{}, err
	}
	expires := time.Now().Add(i.life)
	if end := svid.Certificates[0].NotAfter; end.Before(expires) {
		expires = end
	}
	claims := jwt.RegisteredClaims{
		Subject: svid.ID.String(), Audience: jwt.ClaimStrings{audience.String()}, ExpiresAt: jwt.NewNumericDate(expires),
	}
	signed, err := jwt.NewWithClaims(jwt.SigningMethodES256, claims).SignedString(svid.PrivateKey)
	return signed, expires, err
}

// GetRequestMetadata puts a token for the peer into the headers of each call.
func (i *identity) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	info, ok := credentials.RequestInfoFromContext(ctx)
	if !ok {
		return nil, errors.New("no transport")
	}
	leaf, err := leafOf(info.AuthInfo)
	if err != nil {
		return nil, err
	}
	token, expires, err := i.token(leaf)
	if err != nil {
		return nil, err
	}
	return map[string]string{tokenKey: token, expiresKey: expires.Format(time.RFC3339Nano)}, nil
}

// RequireTransportSecurity keeps tokens off connections without TLS.
func (i *identity) RequireTransportSecurity() bool { return true }

// call returns the credentials of one call; files are sent along with it.
func (i *identity) call(files ...string) (grpc.CallOption, error) {
	perCall := grpcfd.PerRPCCredentials(i)
	transceiver, _ := grpcfd.FromPerRPCCredentials(perCall)
	for _, file := range files {
		select {
		case err := <-transceiver.SendFilename(file):
			if err != nil {
				return nil, fmt.Errorf("send %s: %w", file, err)
			}
		default: // It is sent with the call.
		}
	}
	return grpc.PerRPCCredentials(perCall), nil
}

func leafOf(info credentials.AuthInfo) (*x509.Certificate, error) {
	tls, ok := info.(credentials.TLSInfo)
	if !ok || len(tls.State.PeerCertificates) == 0 {
		return nil, errors.New("the peer has no certificate")
	}
	return tls.State.PeerCertificates[0], nil
}

// caller returns the certificate and the token of whoever calls.
func caller(ctx context.Context) (leaf *x509.Certificate, token, expires string, err error) {
	from, ok := peer.FromContext(ctx)
	if !ok {
		return nil, "", "", errors.New("no peer")
	}
	if leaf, err = leafOf(from.AuthInfo); err != nil {
		return nil, "", "", err
	}
	headers, _ := metadata.FromIncomingContext(ctx)
	tokens, ends := headers.Get(tokenKey), headers.Get(expiresKey)
	if len(tokens) != 1 || len(ends) != 1 {
		return nil, "", "", fmt.Errorf("%d tokens and %d times of expiry in the headers", len(tokens), len(ends))
	}
	if _, err := time.Parse(time.RFC3339Nano, ends[0]); err != nil {
		return nil, "", "", err
	}
	return leaf, tokens[0], ends[0], nil
}

// checkPath holds NSM's policies against a path: every token is unexpired and made out to the next one's owner; the token `signed` was signed by
// the certificate.
func checkPath(list []object, signed int, by *x509.Certificate) error {
	var before jwt.RegisteredClaims
	for i, segment := range list {
		var claims jwt.RegisteredClaims
		if _, _, err := jwt.NewParser().ParseUnverified(text(segment, "token"), &claims); err != nil {
			return fmt.Errorf("token %d: %w", i, err)
		}
		if !claims.VerifyExpiresAt(time.Now(), true) {
			return fmt.Errorf("token %d of %s has expired", i, claims.Subject)
		}
		if i > 0 && !before.VerifyAudience(claims.Subject, true) {
			return fmt.Errorf("token %d is made out to %v, token %d is of %s", i-1, before.Audience, i, claims.Subject)
		}
		before = claims
	}
	if signed >= len(list) {
		return fmt.Errorf("%d segments, the one at %d should be the peer's", len(list), signed)
	}
	key := func(*jwt.Token) (any, error) { return by.PublicKey, nil }
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"ES256"}))
	if _, err := parser.ParseWithClaims(text(list[signed], "token"), &jwt.RegisteredClaims{}, key); err != nil {
		return fmt.Errorf("token %d is not the peer's: %w", signed, err)
	}
	return nil
}
